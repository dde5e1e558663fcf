output "url" {
  description = "Where the API answers, once the machine has installed itself (a few minutes)."
  value = format(
    "%s://%s:%d",
    local.has_tls ? "https" : "http",
    var.public_ip ? aws_instance.server.public_dns : aws_instance.server.private_dns,
    var.port,
  )
}

output "api_key" {
  description = "The first API key: terraform output -raw api_key"
  value       = split(":", local.api_keys)[0]
  sensitive   = true
}

output "instance_id" {
  description = "For aws ssm start-session --target."
  value       = aws_instance.server.id
}
