"""What a run survives: by command what the tests do in small."""
