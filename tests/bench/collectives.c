/* The collectives of a round under SimGrid's SMPI, as fedprompt_mpi does them: see simgrid.py.

   collectives BYTES: rank 0 prints the name, the ranks, the bytes and the simulated seconds of each collective. */

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

#define CHUNK_BYTES (64 << 20)
#define SEGMENT_BYTES (1 << 20)

/* All ranks are threads of one process, so nothing may be global. */
static int my_rank(void) { int rank; MPI_Comm_rank(MPI_COMM_WORLD, &rank); return rank; }
static int ranks(void) { int size; MPI_Comm_size(MPI_COMM_WORLD, &size); return size; }

static int at_most(int a, int b) { return a < b ? a : b; }

/* Every worker sends each chunk to rank 0, which receives them all at once; a barrier stands between two chunks. */
static void gather(char *vector, char *received, int bytes) {
  int rank = my_rank(), workers = ranks() - 1, width = at_most(bytes, CHUNK_BYTES / (workers > 0 ? workers : 1));
  MPI_Request *requests = malloc(sizeof(MPI_Request) * (workers > 0 ? workers : 1));
  for (int at = 0; at < bytes; at += width) {
    int count = at_most(width, bytes - at);
    if (at) MPI_Barrier(MPI_COMM_WORLD);
    if (rank) {
      MPI_Send(vector + at, count, MPI_CHAR, 0, 1, MPI_COMM_WORLD);
      continue;
    }
    for (int worker = 1; worker <= workers; worker++)
      MPI_Irecv(received, count, MPI_CHAR, worker, 1, MPI_COMM_WORLD, &requests[worker - 1]);
    MPI_Waitall(workers, requests, MPI_STATUSES_IGNORE);
  }
  free(requests);
}

/* A binomial tree, in segments: a rank adds one while the next arrives (adding takes no simulated time). */
static void reduce(char *vector, char *received, int bytes) {
  int rank = my_rank(), size = ranks(), segments = (bytes + SEGMENT_BYTES - 1) / SEGMENT_BYTES;
  MPI_Request *requests = malloc(sizeof(MPI_Request) * segments);
  for (int distance = 1; distance < size; distance *= 2) {
    int is_child = (rank & distance) != 0, other = is_child ? rank - distance : rank + distance;
    if (other >= size) continue;
    for (int s = 0; s < segments; s++) {
      int at = s * SEGMENT_BYTES, count = at_most(SEGMENT_BYTES, bytes - at);
      if (is_child) MPI_Isend(vector + at, count, MPI_CHAR, other, 2, MPI_COMM_WORLD, &requests[s]);
      else MPI_Irecv(received, count, MPI_CHAR, other, 2, MPI_COMM_WORLD, &requests[s]);
    }
    MPI_Waitall(segments, requests, MPI_STATUSES_IGNORE);
    if (is_child) break;
  }
  free(requests);
}

static void time_of(const char *name, char *vector, char *received, int bytes) {
  double start, mine, longest;
  MPI_Barrier(MPI_COMM_WORLD);
  start = MPI_Wtime();
  if (name[0] == 'b') MPI_Bcast(vector, bytes, MPI_CHAR, 0, MPI_COMM_WORLD);
  if (name[0] == 'g') gather(vector, received, bytes);
  if (name[0] == 'r') reduce(vector, received, bytes);
  mine = MPI_Wtime() - start;
  MPI_Reduce(&mine, &longest, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  if (my_rank() == 0) printf("%s %d %d %.9f\n", name, ranks(), bytes, longest);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  int bytes = atoi(argv[1]);
  char *vector = SMPI_SHARED_MALLOC(bytes), *received = SMPI_SHARED_MALLOC(bytes);
  for (int argument = 2; argument < argc; argument++) time_of(argv[argument], vector, received, bytes);
  SMPI_SHARED_FREE(received);
  SMPI_SHARED_FREE(vector);
  MPI_Finalize();
  return 0;
}
