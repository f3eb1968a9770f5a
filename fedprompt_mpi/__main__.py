"""python -m fedprompt_mpi."""

from fedprompt_mpi.cli import main

if __name__ == "__main__":
    main()
