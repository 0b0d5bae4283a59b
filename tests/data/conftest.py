"""Property tests are short, and draw the same cases in every run."""

import hypothesis

hypothesis.settings.register_profile(
    "short", max_examples=20, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("short")
