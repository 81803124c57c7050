"""Words of messages for users."""


def counted(n: int, noun: str) -> str:
    """A number of things: `1 batch`, `1,200 batches`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("ch") else "s")
