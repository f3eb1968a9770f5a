"""How large vectors are cut into chunks, so that the receive buffer of rank 0 stays small."""

from fedprompt_mpi.comm.codec import INT8_CHUNK

CHUNK_BYTES = 64 * 2**20
"""Rank 0 has two receive buffers of at most so many bytes, each for one chunk of all clients' vectors."""


def chunk_columns(rows: int, size: int) -> int:
    """Return how many of P columns travel at a time, so that K rows of them fit into `CHUNK_BYTES`.

    It is a multiple of the int8 codec's own chunks, so that a chunk of a quantised vector is quantised too.
    """
    whole = CHUNK_BYTES // (4 * max(1, rows)) // INT8_CHUNK * INT8_CHUNK
    return min(max(whole, INT8_CHUNK), max(size, 1))


def chunks_of(rows: int, size: int) -> list[slice]:
    """Return the chunks in which K vectors of P numbers travel."""
    columns = chunk_columns(rows, size)
    return [slice(at, min(at + columns, size)) for at in range(0, size, columns)]
