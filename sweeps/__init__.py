"""Installed as `ehr_embed.sweeps`: one YAML per search or grid."""
