"""The routing operators for devices. ``bilevel.plugins.contract`` is their one declaration (standard library only)."""
