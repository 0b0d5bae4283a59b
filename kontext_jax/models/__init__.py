"""The networks, one file each: the whole model, its config and its presets."""
