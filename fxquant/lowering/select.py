"""lower: each quantized site gets the first kernel that takes it."""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.annotation import Declined, PassResult, amend_note, note_of
from fxquant.graphs import remove_dead
from fxquant.lowering.rules import RULES, Rule
from fxquant.lowering.site import QuantizedSite, quantized_sites
from fxquant.target import Target


def select_kernels(gm: GraphModule, target: Target, rules: tuple[Rule, ...] = RULES) -> PassResult:
    """Replace each quantized linear by a kernel; what no rule takes stays as it is and is reported with all reasons."""
    result = PassResult()
    for site in quantized_sites(gm):
        reasons: dict[str, list[str]] = {}
        for rule in rules:
            if why := rule.why_not(site, target):
                reasons.setdefault(why, []).append(rule.kernel)
                continue
            _replace(gm, site, rule)
            result.changed += 1
            break
        else:
            words = "; ".join(f"{', '.join(kernels)}: {why}" for why, kernels in reasons.items())
            reason = f"runs as dequantize + linear. {words}"
            amend_note(site.linear, reason=reason)
            result.declined.append(Declined(note_of(site.linear).path or site.linear.name, reason, site.linear.name))
    remove_dead(gm)
    gm.recompile()
    return result


def _replace(gm: GraphModule, site: QuantizedSite, rule: Rule) -> None:
    with gm.graph.inserting_before(site.linear):
        made = rule.build(gm, site)
    amend_note(made, kernel=rule.kernel)
    site.linear.replace_all_uses_with(made)
    gm.graph.erase_node(site.linear)
