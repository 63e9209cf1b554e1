"""Multi-head latent attention: its operators, and what they mean in plain torch."""
