"""Text to image: a few pictures of a concept in, adapters and a new word out.

Nothing is imported here: diffusers is needed only by those who train pictures.
"""
