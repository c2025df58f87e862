"""Features of SAEs, from data: what each does (`surveying`), which tell two sets of chats apart
(`contrast`), which words light which (`tokens`), and what a clamp of one does (`effects`)."""
