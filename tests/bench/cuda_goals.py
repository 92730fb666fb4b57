"""Goals of the CUDA kernels: what the stages found in, a table of what was asked and what was measured out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One ratio: how many times faster than the peer, what was asked, and what was found."""

    what: str
    against: str
    asked: float
    found: float

    def put(self, into: dict[str, Any]) -> None:
        into["goals"].append(asdict(self) | {"reached": self.found >= self.asked})


def table(found: dict[str, Any]) -> str:
    """The goals as Markdown; a dry run says that its numbers are none."""
    facts = found["stages"].get("machine", {}).get("result", {})
    dry = bool(facts.get("dry_run", True))
    lines = [f"{facts.get('gpu', 'no GPU')}, PyTorch {facts.get('torch')}, Triton {facts.get('triton')}, "
             f"{facts.get('date')}", "", "| what | against | goal | measured | |", "|---|---|---|---|---|"]
    for goal in found["goals"]:
        measured = "dry run" if dry else f"{goal['found']:.2f}x"
        mark = "" if dry else "reached" if goal["reached"] else "missed"
        lines.append(f"| {goal['what']} | {goal['against']} | {goal['asked']:.2f}x | {measured} | {mark} |")
    checked = found["stages"].get("check", {}).get("result", {})
    if checked:
        lines += ["", f"kernels that agree with the reference: {len(checked['agree'])}; that do not: "
                      f"{', '.join(checked['differ']) or 'none'}"]
        if not dry:
            lines += [f'PROVEN["{name}"] = ("{facts.get("capability")}",)' for name in checked["agree"]]
    return "\n".join(lines)
