"""lookup: which configuration runs a problem. Nothing is measured here and nothing compiled."""

from __future__ import annotations

import functools
from pathlib import Path

from fxquant.target import M_BUCKETS, Arch, Plan, PlanRow, Problem, Target
from fxquant.tuning.candidates import CpuSpace, Space, arch_of, is_cpu, space_of
from fxquant.tuning.plans.cache import PlanCache
from fxquant.tuning.plans.device import Device, device_of, modelled_device
from fxquant.tuning.plans.records import Entry
from fxquant.tuning.plans.tables import read_table


def lookup(problem: Problem, target: Target | Arch | str, folder: Path | None = None) -> Plan:
    """The plan of a problem, whatever its m, on a target, an architecture or the name of one.

    For each bucket of rows the first of: what the user tuned on this device; what the user had modelled for this
    architecture; the table shipped for it, or for the nearest older one; the heuristic. `folder` is the user's, for
    tests. The plan has no rows if no kernel takes the problem.

    Raises `InvalidOption`: there is no architecture of that name.
    """
    caches = caches_of(target, folder)
    for cache in caches:
        cache.read()  # so that what another process has tuned since is known
    name = "cpu" if is_cpu(target) else arch_of(target).name
    if not is_cpu(target):
        problem = problem.without_steps()
    return _plan(problem.with_m(0), caches, tuple(cache.state for cache in caches), name)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, caches: tuple[PlanCache, ...], states: object, name: str) -> Plan:
    space = space_of(name)
    known = [cache.entries for cache in caches]
    if not isinstance(space, CpuSpace):
        known.append(read_table(name))
    rows = []
    for m in M_BUCKETS:
        of_m = problem.with_m(m)
        candidates = space.candidates(of_m)
        entry = next((found for entries in known if (found := usable(entries.get(of_m), space))), None)
        if entry is not None and entry.config in candidates:  # an older architecture's may not fit
            rows.append(PlanRow(m, entry.config, entry.source))
        elif candidates:
            rows.append(PlanRow(m, candidates[0]))
    return Plan(tuple(rows)).merged()


def caches_of(target: Target | Arch | str, folder: Path | None = None) -> tuple[PlanCache, ...]:
    """The user's files for a target, those that count more first: of the device, of any GPU of its architecture."""
    if is_cpu(target):
        return (plan_cache(device_of(Target("cpu")), folder),)
    arch = arch_of(target)
    here = target if isinstance(target, Target) else Target("cuda", arch=arch.name)
    return tuple(plan_cache(device, folder) for device in dict.fromkeys((device_of(here), modelled_device(arch))))


def usable(entry: Entry | None, space: Space) -> Entry | None:
    """The entry, unless its kernel is gone or has changed since."""
    if entry is None or not entry.kernel_source or space.kernel_source(entry.config.kernel) != entry.kernel_source:
        return None
    return entry


@functools.cache
def plan_cache(device: Device, folder: Path | None = None) -> PlanCache:
    """One a device and process: it remembers what it has read."""
    return PlanCache(device, folder)
