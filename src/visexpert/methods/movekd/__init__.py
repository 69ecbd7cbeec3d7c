"""MoVE-KD: several teachers distilled into one CLIP student."""
