"""The explorer: one data impression at a time, as a widget in a notebook."""
