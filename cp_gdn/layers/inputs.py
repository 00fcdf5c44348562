"""What every layer asks of the tokens that it is given."""

from torch import Tensor

from ..context import CPContext


def check_hidden_states(x: Tensor, hidden_size: int, context: CPContext | None) -> None:
    """Raise ValueError unless ``x`` is [B, T_local, hidden_size] with a token or more, as the context has it."""
    if x.ndim != 3 or x.shape[2] != hidden_size or x.numel() == 0:
        raise ValueError(
            f"hidden_states has shape {tuple(x.shape)}; expected [B, T, hidden_size = {hidden_size}] with a token or "
            "more; packed documents are one row, B = 1"
        )
    if context is not None:
        context.check_tokens(x)
