"""Command-line tools around the two packages. Nothing imports them but the front-door scripts and the tests."""
