"""Try every model type of the installed transformers with every method, and write down what works.

    python -m launch.make_supported

writes fedprompt_mpi/plm/supported.json, and prints the table of the guide.
"""

import logging
import warnings

from fedprompt_mpi.plm.examine import examine_all
from fedprompt_mpi.plm.late_imports import own_the_process
from fedprompt_mpi.plm.supported import format_table, write_table


def main() -> None:
    """Write the file and print the table."""
    own_the_process()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    outcome = examine_all()
    write_table(outcome)
    print(format_table(outcome))


if __name__ == "__main__":
    main()
