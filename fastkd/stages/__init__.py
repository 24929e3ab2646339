"""The stages: each reads artifacts and publishes one. `fastkd.pipeline` runs them in their order."""
