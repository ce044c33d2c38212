"""What a user can get wrong, and what a user should know."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

LONGEST = 20_000  # characters of a message: more of what a hostile file says helps nobody


class ConvLoRAError(ValueError):
    """A call that cannot be carried out; nothing was changed.

    The message is one line: the operation, the value at fault, the remedy. What a file says shows in it escaped, where
    a terminal would not print it but obey.

    Example:
        >>> import torch, convlora
        >>> try:
        ...     convlora.inject(torch.nn.Conv2d(3, 8, 3), targets=["typo"])
        ... except convlora.ConvLoRAError as error:
        ...     print(str(error).split(";")[0])
        inject: target 'typo' selects no layer
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


class ConvLoRAWarning(UserWarning):
    """A call that was carried out, with a consequence that deserves a look.

    Example:
        >>> import warnings, convlora
        >>> warnings.simplefilter("error", convlora.ConvLoRAWarning)  # be strict
        >>> warnings.resetwarnings()
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


def _printable(message: str) -> str:
    shown = message if len(message) <= LONGEST else f"{message[: LONGEST - 40]}… ({len(message):,} characters)"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


@dataclass
class Problems:
    """Everything that is wrong with a set of tensors, to be reported in one message.

    Example:
        >>> problems = Problems(missing=["conv.lora_B"])
        >>> try:
        ...     problems.raise_if_any("load")
        ... except ConvLoRAError as error:
        ...     print(error)
        load: missing: conv.lora_B
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        named = ((f.name.replace("_", "-"), getattr(self, f.name)) for f in fields(self))
        return "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in named if keys)

    def raise_if_any(self, operation: str) -> None:
        if self:
            raise ConvLoRAError(f"{operation}: {self}")


def one_line(error: BaseException) -> str:
    """What another library's exception says, on one line and no longer than an error message can carry.

    Example:
        >>> one_line(OSError("a\\n  b")), one_line(OSError())
        ('a b', 'OSError')
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
