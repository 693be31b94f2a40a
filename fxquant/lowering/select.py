"""lower: each quantized site gets the first kernel that takes it."""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.annotation import Declined, PassResult, amend_note, note_of
from fxquant.graphs import remove_dead
from fxquant.lowering.rule import Rule
from fxquant.lowering.rules import rules_for
from fxquant.lowering.site import QuantizedSite, quantized_sites
from fxquant.target import Target


def select_kernels(gm: GraphModule, target: Target, rules: tuple[Rule, ...] | None = None) -> PassResult:
    """Give each quantized product a kernel; what no rule takes stays as it is, reported with all reasons.

    `rules`: those of the target, unless others are given.
    """
    result = PassResult()
    rules = rules_for(target) if rules is None else rules
    for site in quantized_sites(gm):
        reasons: dict[str, list[str]] = {}
        for rule in (rule for rule in rules if rule.kind == site.kind):
            if why := rule.why_not(site, target):
                reasons.setdefault(why, []).append(rule.kernel)
                continue
            _replace(gm, site, rule, target)
            result.changed += 1
            break
        else:
            reason = _reason(site, target, reasons)
            amend_note(site.product, reason=reason)
            result.declined.append(Declined(note_of(site.product).path or site.product.name, reason, site.product.name))
    remove_dead(gm)
    gm.recompile()
    return result


def _reason(site: QuantizedSite, target: Target, reasons: dict[str, list[str]]) -> str:
    """Why the site runs in reference form: `reasons` has the rules' words, and which kernels they are of."""
    runs = f"runs as dequantize + {site.kind}"
    if target.device != "cpu" and not target.runs_triton:
        return f"no kernels for {target.device}: {runs}"
    words = "; ".join(f"{', '.join(kernels)}: {why}" for why, kernels in reasons.items())
    return f"{runs}. {words}" if words else runs


def _replace(gm: GraphModule, site: QuantizedSite, rule: Rule, target: Target) -> None:
    with gm.graph.inserting_before(site.product):
        made = rule.build(gm, site, target)
    if not note_of(made).kernel:
        amend_note(made, kernel=rule.kernel)
    site.product.replace_all_uses_with(made)
    gm.graph.erase_node(site.product)
