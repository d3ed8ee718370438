"""Text to image: adapters and a new word from a few pictures of a concept.

Nothing is imported here: only training on pictures needs diffusers.
"""
