"""Drawing: what a text-to-image model draws, taught from a few photos and measured."""
