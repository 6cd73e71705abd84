"""The routing operators for devices. ``bilevel.contract`` is their one declaration (standard library only)."""
