"""ToVE: experts fused into CLIP tokens, merged into one CLIP, and the search for the experts worth keeping."""
