"""Surgery on third-party networks: equal outputs on every architecture, and accuracy before and after."""
