"""Models that read passages of a memory while they learn and while they write (RETRO)."""
