"""What has arrived: which domains are held out, which come in which wave, and what is new."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metaopt.errors import UserError
from metaopt.evolution.config import EvolveConfig
from metaopt.tasks.sources.text import Domain, fingerprint, folder_domains, stdlib_domains
from metaopt.tasks.text import TextConfig, kin_of


class Plan(NamedTuple):
    """What becomes of the domains that are there at first.

    Attributes:
      held_out: names of those that are never trained on.
      waves: names of the others by the wave that they come in.
    """

    held_out: list[str]
    waves: list[list[str]]


def domains_of(config: EvolveConfig) -> tuple[Domain, ...]:
    """The domains that are there now.

    Raises:
      UserError: the folder is missing, empty or unreadable.
    """
    if config.folder is None:
        return stdlib_domains()
    return folder_domains(Path(config.folder).expanduser())


def make_plan(names: Sequence[str], config: EvolveConfig) -> Plan:
    """Holds domains out, with their kin, and deals the others to the waves.

    Raises:
      UserError: there are too few domains.
    """
    most = min(config.num_held_out, len(names) // 4)
    if most < 1 or len(names) - most < config.num_waves:
        raise UserError(
            f"there are {len(names)} domains: at least 4 are needed, a quarter of which are held "
            f"out, and one for each of {config.num_waves} waves"
        )
    kin = kin_of(names, TextConfig(source=config.folder or "stdlib", kin=config.kin))
    number = config.num_waves
    rng = np.random.default_rng(config.split_seed)
    order: list[int] = rng.permutation(len(names)).tolist()
    held_out: list[int] = []
    for i in order:
        group = [j for j in order if kin[j] == kin[i]]
        if i not in held_out and len(held_out) + len(group) <= most:
            held_out += group
    rest = [i for i in order if i not in held_out]
    if not held_out:
        raise UserError(f"no group of kin has at most {most} domains: raise num_held_out")
    waves = [sorted([names[i] for i in rest[w::number]]) for w in range(number)]
    return Plan(sorted([names[i] for i in held_out]), waves)


def arrived(
    domains: Sequence[Domain], plan: Plan, seen: Mapping[str, str], last_wave: int
) -> tuple[list[Domain], int]:
    """What is new, and the number of waves that have come then.

    Args:
      domains: those that are there now.
      plan: the waves; those whose domains are all gone are passed over.
      seen: fingerprints of the domains that came in, by name.
      last_wave: number of waves that have come.

    Returns:
      The domains of the next wave; or after the last one, what is there and was not seen, or not
      as it is now.
    """
    found = {domain.name: domain for domain in domains}
    for number, wave in enumerate(plan.waves[last_wave:], last_wave + 1):
        if here := [found[name] for name in wave if name in found]:
            return here, number
    new = [
        domain
        for domain in domains
        if domain.name not in plan.held_out and seen.get(domain.name) != fingerprint([domain])
    ]
    return new, len(plan.waves)
