"""The tiny text world, a miniature of Flow-GRPO's text rendering task; it has the modules of the shapes world beside it."""
