"""Which lines of a text surprised a reader: they cost more bits than others of their length."""

from typing import NamedTuple

import numpy as np

from metaopt.losses import NATS_TO_BITS


class Line(NamedTuple):
    """A line of a text.

    Attributes:
      number: its number, from 1 on.
      text: its bytes, without the end of the line.
      bits: bits that it cost.
      excess: bits beyond what as many bytes cost on average.
    """

    number: int
    text: bytes
    bits: float
    excess: float


def surprising_lines(
    data: bytes, token_bytes: np.ndarray, log_probs: np.ndarray, most: int
) -> list[Line]:
    """The lines whose tokens were the least expected, the most surprising first.

    Args:
      data: the text that was read.
      token_bytes: number of bytes of each of its tokens ``[n]``; a token is of the line in which it
        begins.
      log_probs: logarithms of the probabilities that they had ``[n]``, nats; NaN counts as 0.
      most: number of lines.
    """
    bits = -np.nan_to_num(log_probs.astype(np.float64)) * NATS_TO_BITS
    begins = np.cumsum(token_bytes) - token_bytes
    lines = data.split(b"\n")
    ends = np.cumsum([len(line) + 1 for line in lines])  # with the end of the line
    of_line = np.searchsorted(ends, begins, side="right")
    cost = np.bincount(of_line, bits, minlength=len(lines))[: len(lines)]
    sizes = np.bincount(of_line, token_bytes, minlength=len(lines))[: len(lines)]
    excess = cost - sizes * (cost.sum() / max(1, sizes.sum()))
    order = [i for i in np.argsort(-excess, kind="stable") if sizes[i]][:most]
    return [Line(i + 1, lines[i], float(cost[i]), float(excess[i])) for i in map(int, order)]
