"""Installed as `ehr_embed.conf`, so that other Hydra applications find `pkg://ehr_embed.conf`."""
