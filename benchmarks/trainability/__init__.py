"""Does a network train? The truth, by training: configurations of ours and of plain torch, and what came of each."""
