"""From noise to latents: samplers as tables, windows, the loop and its graphs."""
