"""Members of ehr_embed of this project's own."""
