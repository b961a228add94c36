"""Other people's frameworks: thin, each module imported only when asked for."""
