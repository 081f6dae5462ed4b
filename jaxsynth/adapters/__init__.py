"""Adapters: surgery on a frozen network, and the algebra of what is learned."""
