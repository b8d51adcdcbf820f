"""Plain data that flows between the stages, and what every layer above needs. No torch."""
