"""The adaptation itself: one backward pass, a ranking, a search, a proof, an artifact."""
