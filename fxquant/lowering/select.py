"""lower: each quantized site gets the first kernel that takes it."""

from __future__ import annotations

from torch.fx import GraphModule

from fxquant.annotation import Declined, PassResult, amend_note, note_of
from fxquant.graphs import remove_dead
from fxquant.lowering.rule import Rule
from fxquant.lowering.rules import RULES
from fxquant.lowering.site import QuantizedSite, quantized_sites
from fxquant.target import Target


def select_kernels(gm: GraphModule, target: Target, rules: tuple[Rule, ...] = RULES) -> PassResult:
    """Give each quantized product a kernel; what no rule takes stays as it is, reported with all reasons."""
    result = PassResult()
    for site in quantized_sites(gm):
        reasons: dict[str, list[str]] = {}
        for rule in (rule for rule in rules if rule.kind == site.kind):
            if why := rule.why_not(site, target):
                reasons.setdefault(why, []).append(rule.kernel)
                continue
            _replace(gm, site, rule)
            result.changed += 1
            break
        else:
            words = "; ".join(f"{', '.join(kernels)}: {why}" for why, kernels in reasons.items())
            reason = f"runs as dequantize + {site.kind}. {words}"
            amend_note(site.product, reason=reason)
            result.declined.append(Declined(note_of(site.product).path or site.product.name, reason, site.product.name))
    remove_dead(gm)
    gm.recompile()
    return result


def _replace(gm: GraphModule, site: QuantizedSite, rule: Rule) -> None:
    with gm.graph.inserting_before(site.product):
        made = rule.build(gm, site)
    amend_note(made, kernel=rule.kernel)
    site.product.replace_all_uses_with(made)
    gm.graph.erase_node(site.product)
