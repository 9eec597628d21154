"""Options that take several values at once: `--ratio 1 0.5 0.25` means `--ratio 1 --ratio 0.5 --ratio 0.25`."""

from __future__ import annotations

from collections.abc import Sequence

import typer.core

ARGUMENTS = "compactor_vllm.arguments"
"""Under this key `ctx.meta` has the arguments of the command as they were given."""


class ManyValues(typer.core.TyperCommand):
    """A command whose repeatable options may be followed by several values."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.meta[ARGUMENTS] = list(args)
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, repeated(args, repeatable))


def repeated(args: Sequence[str], options: set[str]) -> list[str]:
    """The arguments with a repeatable option written again before each of its further values.

    What follows a value is a further one unless it begins with "-"; "--" ends the options.
    """
    result: list[str] = []
    current: str | None = None
    values = 0
    for position, arg in enumerate(args):
        if arg == "--":
            return result + list(args[position:])
        if arg.startswith("-") and len(arg) > 1:
            current, values = (arg if arg in options else None), 0
        elif current is not None:
            values += 1
            if values > 1:
                result.append(current)
        result.append(arg)
    return result
