"""Speed, shown: each file is named for its question and pairs ours with a peer in the same run."""
