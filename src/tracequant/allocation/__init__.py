"""From sensitivities and limits to bits. No torch: another budget takes no model and no second of import."""
