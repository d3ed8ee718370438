"""A small text-to-image model, trained from scratch on drawn glyphs, on which concept training can be measured."""
