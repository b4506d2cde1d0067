"""Around a run: its folder, the checks of its config, closing tables and reports."""
