"""The networks, one file each: model, config and presets."""
