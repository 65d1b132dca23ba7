"""learn: an order of keys that is predicted from the key alone, fitted on texts, judged on others by likelihood."""
