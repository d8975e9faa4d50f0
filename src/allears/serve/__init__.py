"""Live sound over the network: a server of echo cancellation for many streams at once, and a web page to try it."""
