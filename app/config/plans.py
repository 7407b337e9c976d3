"""Plans that extend others: each gets, for what it leaves out, the value of the plan that it names."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from app.config.reading import Faults, known
from app.config.written import WrittenExtendedPlan


def inherited(plans: Mapping[str, WrittenExtendedPlan | None], faults: Faults) -> dict[str, WrittenExtendedPlan | None]:
    """The plans with nothing left to look up. A value of an extending plan counts before that of the extended one."""
    return {name: None if plan is None else _whole(name, plan, plans, faults) for name, plan in plans.items()}


def _whole(
    name: str, plan: WrittenExtendedPlan, plans: Mapping[str, WrittenExtendedPlan | None], faults: Faults
) -> WrittenExtendedPlan:
    seen = [name]
    whole = plan
    while plan is not None and plan.extends is not None:
        path = f"plans.{seen[-1]}.extends"
        if plan.extends in seen:
            faults.add(path, f"goes in a circle: {' -> '.join([*seen, plan.extends])}")
            break
        known(plan.extends, plans, "plan", path, faults)
        seen.append(plan.extends)
        plan = plans.get(plan.extends)
        if plan is not None:
            left_out = [key for key in whole.__struct_fields__ if key != "extends" and getattr(whole, key) is None]
            whole = msgspec.structs.replace(whole, **{key: getattr(plan, key) for key in left_out})
    return whole
