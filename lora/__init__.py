"""Low-rank adapters whose gradients are formed from their factors, and attention whose gradients are nearly linear."""

__all__: list[str] = []
