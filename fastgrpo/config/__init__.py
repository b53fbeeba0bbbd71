"""What a configuration may say."""
