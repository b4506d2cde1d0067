"""Methods: every one is a LightningModule, read top to bottom, changed by overriding one hook."""
