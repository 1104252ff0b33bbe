"""ATS: arbitrary transfer sets, balanced by the teacher (Nayak et al., WACV 2021)."""
